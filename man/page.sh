#!/bin/sh
# page.sh PAGE.scd OPTIONS SCDOC: the page with its @OPTIONS@ and @EXIT@ lines filled in, as roff on stdout.
# SOURCE_DATE_EPOCH is what scdoc dates the page with: fixed, so that two builds give the same bytes.
set -eu
: "${SOURCE_DATE_EPOCH:=0}"
export SOURCE_DATE_EPOCH
sed -e "/^@OPTIONS@\$/{r $2
d}" -e "/^@EXIT@\$/{r ${1%/*}/exit.scd
d}" "$1" | "$3"
