#!/bin/bash
# Everything that needs a GPU, within 10 minutes on one card, offline: throughput at real shapes, the estimate of a 70B base
# that is sharded, then the tests of the kernels and of a base that is sharded over this one card. Arguments go to
# benchmarks/gpu.py (see --help there); --cpu --size tiny tries the code without a GPU.
#   PYTHON  the interpreter (default: python3)
#   WHEELS  a folder of wheels for what is missing there, and for what they need
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

missing() { # packages of lora_kit, and pytest, that this interpreter does not have
    "$python" - <<'END'
from importlib.util import find_spec
modules = {"torch": "torch", "transformers": "transformers", "peft": "peft", "accelerate": "accelerate",
           "datasets": "datasets", "safetensors": "safetensors", "huggingface_hub": "huggingface_hub",
           "pydantic": "pydantic", "ruamel.yaml": "ruamel.yaml", "typer": "typer", "rich": "rich", "numpy": "numpy",
           "jaxtyping": "jaxtyping", "psutil": "psutil", "xxhash": "xxhash", "platformdirs": "platformdirs",
           "pytest": "pytest", "beartype": "beartype"}

def there(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False

print(" ".join(package for name, package in modules.items() if not there(name)))
END
}

wanted=$(missing) || { echo "benchmarks/gpu.sh: $python does not run; set PYTHON" >&2; exit 2; }
if [ -n "$wanted" ] && [ -n "${WHEELS:-}" ]; then
    extra=$(mktemp -d)
    trap 'rm -rf "$extra"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$extra" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$extra"
    wanted=$(missing)
fi
if [ -n "$wanted" ]; then
    echo "benchmarks/gpu.sh: $python has no $wanted; install them, or set WHEELS to a folder of their wheels" >&2
    exit 2
fi

"$python" "$here/gpu.py" "$@"
measured=$?
cd "$(dirname "$here")" || exit 1
for recipe in recipes/sft-*-70b-fsdp.yaml; do # what a sharded base of 70B is estimated to take on 8 of these cards
    echo "$recipe" && "$python" -m lora_kit check "$recipe" --offline --shapes tests/shapes --processes 8 | grep -v "^not checked"
done
"$python" -m pytest -m gpu tests
tested=$?
exit $((measured || tested))
