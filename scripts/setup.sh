#!/bin/bash
# setup.sh [--all]: installs the packages that are missing, on Debian 12 or Ubuntu 24.04 (the names are the
# same); --all adds those that only ./scripts/test.sh --all uses. Needs root or sudo only when something
# is missing, and does nothing otherwise.
set -euo pipefail

build=(gcc g++ cmake ninja-build pkg-config libcjson-dev libxxhash-dev libssl-dev libzstd-dev libarchive-dev
    libpcre2-dev libutf8proc-dev libsentencepiece-dev libedit-dev libyaml-dev libopenblas-dev
    libmicrohttpd-dev libgnutls28-dev libcurl4-openssl-dev)
use=(check make openssl python3 scdoc zstd)
all=(clang-format git python3-numpy python3-jinja2 python3-venv bsdutils zsh fish)

packages=("${build[@]}" "${use[@]}")
if [ "${1:-}" = --all ]; then
    packages+=("${all[@]}")
    # The chat page is driven in a real browser; on Ubuntu the package is a snap, and that test skips.
    ! grep -qs '^ID=debian' /etc/os-release || packages+=(chromium)
fi

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "setup: not a Debian system: install what these packages hold by hand: ${packages[*]}" >&2
    exit 0
fi
missing=()
for p in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "setup: all ${#packages[@]} packages are installed"
    exit 0
fi

root=()
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || {
        echo "setup: missing ${missing[*]}; run as root or install sudo" >&2
        exit 1
    }
    root=(sudo)
fi
echo "setup: installing ${missing[*]}"
apt() { "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 "$@"; }
# The lists may be fresh enough already; old ones fail on package files that are gone.
apt install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
    { apt update && apt install -y --no-install-recommends "${missing[@]}"; }
echo "setup: done"
