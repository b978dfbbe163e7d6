# tm-run info --memory: what a session takes on a device.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo

check 'memory as JSON' 0 tm-run info "$demo" --memory --session-len 256 --json
out_json 'd["memory"]["cache"] == 1048576 and d["memory"]["session_len"] == 256'
out_json 'd["memory"]["total"] == sum(d["memory"][k] for k in ("weights", "mapped", "cache", "workspace"))'
check 'a cache of 8 bits is smaller' 0 tm-run info "$demo" --memory --session-len 256 --quant-policy 8 --json
out_json '524288 < d["memory"]["cache"] < 560000'
check 'as lines' 0 tm-run info "$demo" --memory
out_has 'memory on cpu .*, sessions of 1024 tokens:'
out_has 'workspace'
check 'not asked for' 0 tm-run info "$demo" --json
out_json '"memory" not in d'
check 'only of models' 3 tm-run info "$demo/calib.jsonl" --memory
check 'too small a cache' 5 tm-run info "$demo" --memory --kv-mem 1K
finish
