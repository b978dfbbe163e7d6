#!/bin/bash
# check_symbols.sh BUILD_DIR: every external symbol of our static libraries is declared in a header of its
# folder, and begins with the name of a module: a header or source file there (or that name's first word),
# or a word listed here for its folder. So whoever reads a name finds the file, and nothing is external by
# accident.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:?usage: check_symbols.sh BUILD_DIR}

extra() { # words of a folder's modules that are no file name
    case $1 in
        base) echo 'path dir arena dtype' ;;       # file.h: path, dir; mem.h: arena; tensor.h: dtype
        kernels) echo 'dev op check' ;;            # device.h: dev; ops.h: op; ops_check.h: check
        formats)                                   # safetensors.h: st; model.h: role; the tokenizer's parts;
            echo 'st role tok token bpe vocab trie added utf8 cut bytelevel' # values, text, filters of jinja
            echo 'jv jmap jstr jout jf' ;;
        runtime/serve) echo 'answer serve' ;;      # engine.h: answer; page.h: serve_page
        runtime) echo 'gen sample ppl' ;;          # generate.h: gen; sampler.h: sample; score.h: ppl
        awq) echo 'block linear moment quant tile loss plan rotated' ;; # measure.h, method.h, rotate.h
        *) echo '' ;;
    esac
}

modules() { # the words of a folder
    local f
    for f in "$1"/*.h "$1"/*.c "$1"/*.cu; do
        [ -e "$f" ] || continue
        f=${f##*/}
        f=${f%.*}
        echo "${f%_internal}"
        echo "${f%%_*}"
    done
    extra "$1" | tr ' ' '\n'
}

bad=0 count=0
for lib in "$build"/*/lib*.a "$build"/*/*/lib*.a; do
    folder=${lib#"$build"/}
    folder=${folder%/*}
    [ "$folder" != lib ] || continue # all the others in one, with a list of its own (tests/test_lib.c)
    [ -d "$folder" ] || continue
    prefixes=$(modules "$folder" | sort -u)
    while read -r object symbol; do
        count=$((count + 1))
        case $symbol in __* | _Z* | _GLOBAL* | DW.ref.*) continue ;; esac # the compiler's, the C++ runtime's
        name=$symbol
        case $object in *.cc.o) ;; *) name=$(sed -E 's/_(avx2|avx512|amx)$//' <<<"$symbol") ;; esac
        if ! grep -qhwE -- "($symbol|$name)" "$folder"/*.h "$folder"/*.cuh 2>/dev/null; then
            echo "$folder/${object%.o}: $symbol is external, but in no header of $folder"
            bad=1
        fi
        ok=0
        for p in $prefixes; do case $symbol in "$p"_* | "$p") ok=1; break ;; esac; done
        [ $ok -eq 1 ] || { echo "$folder/${object%.o}: $symbol lacks a module prefix"; bad=1; }
    done < <(nm -A -g --defined-only "$lib" 2>/dev/null | sed -nE 's/^[^:]*:([^:]+):[0-9a-f]* [A-Z] (.*)$/\1 \2/p')
done
[ $bad -eq 0 ] && echo "symbols: $count external symbols are declared and named well"
exit $bad
