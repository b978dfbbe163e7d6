#!/usr/bin/env python3
"""The house rules that a compiler does not know (docs/architecture.md): which folder may include which,
who may use a third-party header, what library code must not call, where model family names may stand,
and how long files and functions may be. Prints one line a breach; exit 1 when there is one.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LAYERS = {  # folder: folders it may include besides itself
    "base": set(),
    "kernels": {"base"},
    "formats": {"base"},
    "datasets": {"base", "formats"},
    "runtime": {"base", "kernels", "formats"},
    "calib": {"base", "kernels", "formats", "runtime", "datasets"},
    "awq": {"base", "kernels", "formats", "runtime"},
    "tools": {"base", "kernels", "formats", "datasets", "runtime", "calib", "awq"},
    "lib": {"base", "kernels", "formats", "runtime"},
}
THIRD_PARTY = {  # header: folders that may include it
    "cjson/cJSON.h": {"base", "formats"},
    "xxhash.h": {"base", "formats"},
    "openssl/": {"base", "formats"},
    "zstd.h": {"formats", "datasets"},
    "archive": {"formats", "datasets"},
    "pcre2.h": {"formats"},
    "utf8proc.h": {"formats"},
    "sentencepiece": {"formats"},
    "yaml.h": {"formats"},
    "cblas.h": {"kernels"},
    "microhttpd.h": {"runtime"},
    "gnutls/": {"runtime"},
    "curl/": {"tools"},
    "histedit.h": {"tools"},
    "editline/": {"tools"},
}
# What only the process may decide: output, its end, its environment.
FORBIDDEN = re.compile(r"\b(printf|puts|putchar|perror|exit|_exit|abort|getenv|setlocale|signal|sigaction)\s*\(")
# Known to formats alone, in the family table, its configuration readers and the chat templates.
# Lines of help text (ending in \n) may use a model as an example.
FAMILIES = re.compile(r'"[^"]*(internlm|llama|mistral|qwen)[^"]*(?<!\\n)"', re.IGNORECASE)
FAMILY_FILES = re.compile(r"formats/(family|hf_|chat|tm_|store|tokenizer)[^/]*\.(c|h|cc)$")

breaches = []


def breach(path, line, text):
    breaches.append(f"{path}:{line}: {text}")


def sources(folder):
    for base, _, names in os.walk(os.path.join(ROOT, folder)):
        for name in sorted(names):
            if name.endswith((".c", ".h", ".cc", ".cu", ".cuh")):
                yield os.path.relpath(os.path.join(base, name), ROOT)


def blank_comments(text):
    """Comments become spaces; lines stay where they are."""
    keep = lambda m: m.group(0) if m.group(0)[0] in "\"'" else re.sub(r"[^\n]", " ", m.group(0))
    return re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|/\*.*?\*/|//[^\n]*', keep, text, flags=re.S)


def check_include(path, folder, number, target, system):
    if system:
        for header, users in THIRD_PARTY.items():
            if target.startswith(header) and folder not in users:
                breach(path, number, f"<{target}> belongs to {' and '.join(sorted(users))}")
        if re.match(r"(cuda|cublas|mma\.h|nccl)", target) and not path.endswith((".cu", ".cuh")):
            breach(path, number, f"<{target}>: CUDA headers stay in .cu and .cuh files")
        if target.startswith("sentencepiece") and not path.endswith(".cc"):
            breach(path, number, f"<{target}>: only the C++ shim sees it")
        return
    owner = target.split("/")[0] if "/" in target else folder
    if owner not in LAYERS:
        return
    if owner != folder and owner not in LAYERS[folder]:
        breach(path, number, f'"{target}": {folder} must not include {owner}')
    if folder == "runtime" and target.startswith("runtime/serve/") and not path.startswith("runtime/serve/"):
        breach(path, number, f'"{target}": the model half must not include the serve half')
    if owner != folder and re.search(r"_internal\.h$|\.cuh?$", target):
        breach(path, number, f'"{target}" is private to {owner}')


def check_source(path, folder):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        text = f.read()
    code = blank_comments(text)
    for number, line in enumerate(code.split("\n"), 1):
        m = re.match(r'\s*#\s*include\s*([<"])([^>"]+)', line)
        if m:
            check_include(path, folder, number, m.group(2), m.group(1) == "<")
            continue
        if folder != "tools":
            m = FORBIDDEN.search(re.sub(r'"(?:\\.|[^"\\])*"', '""', line))
            if m:
                breach(path, number, f"{m.group(1)}() in library code")
        if not FAMILY_FILES.match(path) and FAMILIES.search(line):
            breach(path, number, f"model family name {FAMILIES.search(line).group(0)}")
    check_size(path, code)


def check_size(path, code):
    lines = code.split("\n")
    # Public headers are contracts; internal ones, and those of inline code, may be longer.
    internal = path.endswith("_internal.h") or "static inline" in code
    limit = 200 if path.endswith(".h") and not internal else 800
    if len(lines) - 1 > limit:
        breach(path, len(lines) - 1, f"the file has more than {limit} lines")
    start = None
    for number, line in enumerate(lines, 1):
        if line == "{":
            start = number
        elif line == "}" and start:
            if number - start - 1 > 100:
                breach(path, start, f"a function of {number - start - 1} lines (60, 100 with a reason)")
            start = None


def check_main(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        text = f.read()
    if re.search(r"^int main\(", text, re.M) and text.count("\n") > 150:
        breach(path, 1, "a tool's main has more than 150 lines")


def main():
    files = 0
    for folder in LAYERS:
        for path in sources(folder):
            files += 1
            check_source(path, folder)
            if folder == "tools":
                check_main(path)
    print("\n".join(breaches) if breaches else f"layers: {files} files keep the rules")
    sys.exit(bool(breaches))


if __name__ == "__main__":
    main()
