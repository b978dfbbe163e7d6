# What every tool has in common, and what `cmake --install` puts where.
. "$TMF_CLI/lib.sh"
tools='calib-collect awq-search pack-w4 tm-convert tm-run'

for tool in $tools; do
    check "$tool --version" 0 $tool --version
    out_has "^$tool \(tmforge\) [0-9]"
    out_has '^licence: Apache-2.0$'
    out_has '^backends: cpu'
    err_lines 0
    check "$tool --version --json" 0 $tool --version --json
    out_json "d['name'] == '$tool' and d['licence'] == 'Apache-2.0' and 'cpu' in d['backends']"
    check "$tool --help" 0 $tool --help
    out_has "^usage: $tool "
    [ "$(wc -L <out)" -le 100 ]; verdict $? "$tool --help fits 100 columns"
    err_lines 0
    check "$tool without arguments" 2 $tool
    err_lines 1
    check "$tool --nope" 2 $tool --nope
    err_lines 1
    err_has "^$tool: .*'--nope'"
    check "$tool --help to a full disk" 6 sh -c "$tool --help >/dev/full"
done
tm-run --help | sed -nE '/^commands:/,/^$/s/^  ([a-z]+) .*/\1/p' >commands
[ "$(wc -l <commands)" -ge 8 ]; verdict $? 'tm-run lists its commands'
for command in $(cat commands); do
    check "tm-run $command --help" 0 tm-run "$command" --help
    out_has "^usage: tm-run $command "
    [ "$(wc -L <out)" -le 100 ]; verdict $? "tm-run $command --help fits 100 columns"
done
while read -r command rest; do
    check "tm-run $command on nothing" 6 tm-run "$command" no/such/dir $rest
    err_lines 1
    err_has "^tm-run: cannot open .*'no/such/dir': No such file or directory$"
done <<'END'
chat -p x
generate --prompt x
ppl --data f
score --ids 1
tasks --data f
bench
tokenize --text x
info
END

# The names that scripts of LMDeploy use.
for pair in 'calib-collect work-dir' 'calib-collect calib-dataset' 'calib-collect calib-samples' \
    'calib-collect calib-seqlen' 'awq-search w-bits' 'awq-search w-group-size' 'awq-search search-scale' \
    'tm-convert dst-path' 'tm-convert model-format'; do
    set -- $pair
    check "$1 knows --$2" 0 $1 --help
    out_has "--$2"
done

check 'install' 0 cmake --install "$TMF_BIN/.." --prefix "$PWD/root"
for tool in $tools; do
    check "installed $tool" 0 root/bin/$tool --version
    [ -s root/share/bash-completion/completions/$tool ] && [ -s root/share/zsh/site-functions/_$tool ] &&
        [ -s root/share/fish/vendor_completions.d/$tool.fish ]
    verdict $? "completions of $tool"
    page=root/share/man/man1/$tool.1
    if [ ! -e $page ]; then
        skip "no scdoc: no man page of $tool"
        continue
    fi
    # Every option of the help stands in the page.
    missing=
    { $tool --help; [ $tool != tm-run ] || for c in $(cat commands); do tm-run "$c" --help; done; } |
        grep -oE '^ +(-[a-z], )?--[a-z0-9-]+' | grep -oE -- '--[a-z0-9-]+' | sort -u >options
    sed 's/\\//g' $page >plain
    while read -r o; do grep -q -- "$o" plain || missing="$missing $o"; done <options
    [ -z "$missing" ] && [ "$(wc -l <options)" -gt 5 ]
    verdict $? "the page of $tool has every option" "missing:$missing"
    grep -q 'EXIT STATUS' plain; verdict $? "the page of $tool has the exit codes"
done
[ -s root/share/tmforge/quantize.mk ]; verdict $? 'quantize.mk is installed'
for f in README.md CHANGELOG.md LICENSE architecture.md formats.md numerics.md perf.md migrate.md; do
    [ -s root/share/doc/tmforge/$f ]; verdict $? "$f is installed"
done
finish
