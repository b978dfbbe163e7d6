# libtmforge as another project sees it: its symbols, the header alone, the example against both libraries.
. "$TMF_CLI/lib.sh"
lib=$(cd "$TMF_BIN/../lib" 2>/dev/null && pwd) && [ -e "$lib/libtmforge.so" ] || {
    skip 'libtmforge is not built here'
    finish
}
if nm -D "$lib/libtmforge.so" | grep -q __asan; then
    skip 'the library needs the sanitizer in the process that loads it'
    finish
fi
: "${CC:=cc}"
tmf_names() { # of the header, in order
    grep -oE '\btmf_[a-z_]+\(' "$TMF_SOURCE/lib/tmforge.h" | tr -d '(' | sort -u
}
check 'the shared library exports what the header says' 0 bash -c \
    "nm -D --defined-only '$lib/libtmforge.so' | awk '\$2 == \"T\" { sub(/@.*/, \"\", \$3); print \$3 }' | sort"
tmf_names >want
same out want
check 'and nothing else' 0 bash -c \
    "nm -D --defined-only '$lib/libtmforge.so' | awk '\$2 != \"A\" { print \$3 }' | grep -vc '^tmf_' || true"
out_is 0
check 'its name' 0 bash -c "readelf -d '$lib/libtmforge.so' | grep SONAME"
out_has '\[libtmforge\.so\.0\]'
cat >alone.c <<'C'
#include "tmforge.h"
int main(void) { return tmf_version()[0] == 0; }
C
check 'the header in strict C99' 0 "$CC" -std=c99 -Wall -Wextra -Wpedantic -Werror -I "$TMF_SOURCE/lib" -c alone.c
cp alone.c alone.cc
check 'and in C++' 0 "${CXX:-c++}" -std=c++11 -Wall -Wextra -Wpedantic -Werror -I "$TMF_SOURCE/lib" -c alone.cc
# The module's structs are the header's, field by field.
python3 - >layout.c <<P
import ctypes, re, sys
sys.path.insert(0, "$TMF_SOURCE/lib")
import os
os.environ["TMFORGE_LIBRARY"] = "$lib/libtmforge.so"
import tmforge
print('#include <stddef.h>\n#include "tmforge.h"\nint main(void) { return 0; }')
for name, c in (("Error", "error"), ("Options", "options"), ("Info", "info"), ("GenOptions", "gen_options"),
                ("Prompt", "prompt"), ("Piece", "piece")):
    s = getattr(tmforge, name)
    print(f'_Static_assert(sizeof(tmf_{c}) == {ctypes.sizeof(s)}, "{name}");')
    for field, _ in s._fields_:
        print(f'_Static_assert(offsetof(tmf_{c}, {field}) == {getattr(s, field).offset}, "{name}.{field}");')
P
check 'the structs of tmforge.py' 0 "$CC" -I "$TMF_SOURCE/lib" layout.c -o layout
grep -c _Static_assert layout.c >out
out_has '^[6-9][0-9]$'
check 'the example' 0 "$CC" -Wall -Wextra -Werror -I "$TMF_SOURCE/lib" "$TMF_SOURCE/examples/generate.c" -o shared \
    -L "$lib" -ltmforge "-Wl,-rpath,$lib"
check 'answers' 0 ./shared "$TMF_SOURCE/datasets/demo" 'What is 17 + 25?' 'say "hello"'
out_has '^1: 17 \+ 25 = 42\.'
check 'or says why not' 1 ./shared /nonexistent 'What?'
err_has "^generate: .*'/nonexistent'"

if [ -e "$lib/libtmforge.a" ]; then
    check 'the static library has no other global symbols' 0 bash -c \
        "nm -g --defined-only '$lib/libtmforge.a' | awk 'NF == 3 { print \$3 }' | sort"
    same out want
    needs=$(sed -n 's/^Requires.private: //p' "$lib/tmforge.pc")
    # shellcheck disable=SC2046,SC2086
    check 'the example with it' 0 "$CC" -I "$TMF_SOURCE/lib" "$TMF_SOURCE/examples/generate.c" -o static \
        "$lib/libtmforge.a" $(pkg-config --libs $needs) $(sed -n 's/^Libs.private: //p' "$lib/tmforge.pc")
    check 'answers, too' 0 ./static "$TMF_SOURCE/datasets/demo" 'What is 17 + 25?'
    out_has '^1: 17 \+ 25 = 42\.'
else
    skip 'the static library is not built here'
fi

check 'install' 0 cmake --install "$TMF_BIN/.." --prefix "$PWD/root"
export PKG_CONFIG_PATH
PKG_CONFIG_PATH=$(dirname "$(find root -name tmforge.pc)")
# shellcheck disable=SC2046
check 'pkg-config finds it' 0 "$CC" "$TMF_SOURCE/examples/generate.c" -o installed \
    $(pkg-config --define-prefix --cflags --libs tmforge) "-Wl,-rpath,$PWD/$(dirname "$PKG_CONFIG_PATH")"
check 'and it answers' 0 ./installed "$TMF_SOURCE/datasets/demo" 'What is 17 + 25?'
out_has '^1: 17 \+ 25 = 42\.'
check 'the installed module finds the installed library' 0 env \
    PYTHONPATH="$PWD/root/share/tmforge/python" TMFORGE_LIBRARY="$PWD/$(dirname "$PKG_CONFIG_PATH")/libtmforge.so" \
    python3 -c 'import tmforge; print(tmforge.version())'
out_has '^[0-9]+\.[0-9]+\.[0-9]+$'
finish
