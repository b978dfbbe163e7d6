#!/bin/bash
# format.sh [--check] [FILE ...]: formats the C sources, or with --check only says which are not; lines of
# more than 100 columns are refused too (clang-format leaves comments alone).
set -uo pipefail
cd "$(dirname "$0")/.."
check=0
[ "${1:-}" != --check ] || { check=1; shift; }
list() { # tracked files; in an unpacked archive all of them
    git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cc' 2>/dev/null || find . -path ./build -prune -o -name '*.[ch]' -print -o -name '*.cu*' -print -o -name '*.cc' -print
}
if [ $# -gt 0 ]; then files=("$@"); else mapfile -t files < <(list); fi
command -v clang-format >/dev/null || { echo 'format: no clang-format here' >&2; exit 1; }
if [ $check -eq 0 ]; then
    exec clang-format -i "${files[@]}"
fi
bad=0
for f in "${files[@]}"; do
    [ -e "$f" ] || continue
    clang-format "$f" | cmp -s - "$f" || { echo "$f: not formatted (scripts/format.sh)"; bad=1; }
    LC_ALL=C.UTF-8 awk -v f="$f" 'length > 100 { print f ":" NR ": " length " columns"; e = 1 } END { exit e }' "$f" ||
        bad=1
done
[ $bad -eq 0 ] && echo "format: ${#files[@]} files are well formatted"
exit $bad
