# tm-run tokenize: both directions, special tokens, sources, errors.
. "$TMF_CLI/lib.sh"
demo=$TMF_SOURCE/datasets/demo

python3 - "$demo/golden.json" <<'P'
import json, sys
for i, t in enumerate(json.load(open(sys.argv[1]))["tokenize"]):
    open(f"text{i}", "wb").write(t["text"].encode())
    json.dump(t["ids"], open(f"ids{i}", "w"))
P
for f in text*; do
    n=${f#text}
    check "golden text $n" 0 tm-run tokenize "$demo" --data "$f" --json
    out_json 'd["ids"] == json.load(open("ids'"$n"'"))'
done
check 'to text' 0 tm-run tokenize "$demo" --ids "$(tr -d '[] ' <ids0)" --json
out_json 'd["text"] == open("text0").read()'

check 'from an argument' 0 tm-run tokenize "$demo" --text 'Hello, world!'
out_is '4041 417 4011 4026 1100 4055'
check 'from standard input' 0 bash -c "printf 'Hello, world!' | tm-run tokenize '$demo' --data -"
out_is '4041 417 4011 4026 1100 4055'
check 'special strings are text' 0 tm-run tokenize "$demo" --text '<|im_end|>' --json
out_json 'len(d["ids"]) > 1 and 4094 not in d["ids"]'
check 'special strings parsed' 0 tm-run tokenize "$demo" --text '<|im_end|>' --parse-special --json
out_json 'd["ids"] == [4094]'
check 'special ids' 0 tm-run tokenize "$demo" --ids 4041,4094
out_is 'H<|im_end|>'
check 'special ids left out' 0 tm-run tokenize "$demo" --ids 4041,4094 --skip-special
out_is 'H'

mkdir tok
cp "$demo/tokenizer.model" tok
check 'a tokenizer alone' 0 tm-run tokenize tok --text 'Hello, world!'
out_is '4041 417 4011 4026 1100 4055'
: >nothing
check 'empty text' 0 tm-run tokenize "$demo" --data nothing --json
out_json 'd["ids"] == []'

check 'nothing asked' 2 tm-run tokenize "$demo"
check 'two things asked' 2 tm-run tokenize "$demo" --text a --ids 1
check 'id beyond the vocabulary' 3 tm-run tokenize "$demo" --ids 4096
err_has 'id 4096: expected 0 to 4095'
check 'no such file' 6 tm-run tokenize "$demo" --data nowhere
mkdir empty
check 'no tokenizer' 3 tm-run tokenize empty --text a
err_lines 1
head -c 1000 "$demo/tokenizer.model" >tok/tokenizer.model
check 'cut tokenizer' 3 tm-run tokenize tok --text a
err_lines 1
finish
