#!/bin/bash
# run.sh [-b BIN_DIR] [SCRIPT ...]: runs the transcripts of this folder (all by default), each in a fresh
# folder; prints their lines and fails if one of them does. CMake registers each as a test of its own.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${TMF_BIN:=$here/../../build/tools}"
while getopts b: o; do
    case $o in b) TMF_BIN=$OPTARG ;; *) exit 2 ;; esac
done
shift $((OPTIND - 1))
TMF_BIN=$(cd "$TMF_BIN" && pwd) || exit 2
TMF_SOURCE=$(cd "$here/../.." && pwd)
: "${TMF_SHARED:=$TMF_SOURCE/../shared}"
export TMF_BIN TMF_SOURCE TMF_SHARED TMF_CLI=$here
[ $# -gt 0 ] || set -- "$here"/*.sh

failed=0 skipped=0
for script; do
    case ${script##*/} in lib.sh | run.sh) continue ;; esac
    script=$(cd "$(dirname "$script")" && pwd)/${script##*/}
    work=$(mktemp -d "${TMPDIR:-/tmp}/tmforge-cli-XXXXXX") || exit 2
    echo "# ${script##*/}"
    code=0
    (cd "$work" && exec bash "$script") || code=$?
    case $code in
        0) ;;
        77) skipped=77 ;; # the script has said why
        *) failed=1 && echo "# ${script##*/} failed" ;;
    esac
    rm -rf "$work"
done
[ $failed -eq 0 ] || exit 1
exit $skipped
