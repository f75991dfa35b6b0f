#!/usr/bin/env bash
# Makes the small model from nothing: corpus, untrained model, stage 1 (CTC), stage 0 (align), stage 2 (dynamic
# compression), what was trained as the repository carries it, and its evaluation.
#
#   SPEECH=folder TEXTS=folder bash small/recipe.sh
#
# SPEECH and TEXTS are what small/corpus.py reads. All lands in work/small. A run that was stopped goes on where it was.
# A rehearsal of every step:
#
#   SPEECH=folder TEXTS=folder HOURS=0.2 QUICK_HOURS=0 STEPS=3 bash small/recipe.sh
#
# Other settings: WORK (folder), BASE (folder with the public weights, which are fetched otherwise), ONLY (of
# small/corpus.py; "none" takes the recordings that are there).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SPEECH:?name the folder of human speech}" "${TEXTS:?name the folder of texts}"
WORK=${WORK:-work/small}
base=(${BASE:+--base "$BASE"})
corpus=$WORK/corpus

# Settings of a stage: its folders, and few steps of few rows in a rehearsal.
stage() {
    local name=$1 model=$2 data=$3
    local held_out=$corpus/$data-val.jsonl
    local -a options=(--model "$WORK/$model" --output_dir "$WORK/$name" --feature_cache "$WORK/features")
    if [ -n "${STEPS:-}" ]; then
        held_out=$corpus/$data-val-rehearsal.jsonl
        head -n 8 "$corpus/$data-val.jsonl" > "$held_out"
        options+=(--max_steps "$STEPS" --per_device_train_batch_size 4 --logging_steps 1)
    elif nvidia-smi &> /dev/null; then
        options+=(--bf16 true)
    elif grep -q bf16 /proc/cpuinfo; then
        options+=(--use_cpu true --bf16 true) # three times as fast as float32 on a CPU that multiplies it
    fi
    options+=(--train_data "$corpus/$data-train.jsonl" --eval_data "$held_out")
    if [ "$name" = align ]; then
        options+=(--text_data "$corpus/tasks-train.jsonl" ${STEPS:+--regression_rows 40})
    fi
    [ -e "$WORK/$name/config.json" ] || python -m "fastlongspeech.train.$name" "small/$name.yaml" "${options[@]}"
}

python -m fastlongspeech.small.corpus "$corpus" --speech "$SPEECH" --texts "$TEXTS" \
    --hours "${HOURS:-15}" --quick-hours "${QUICK_HOURS:-24}" --only "${ONLY:-}"
python -m fastlongspeech.small.manifests "$corpus"
if [ ! -e "$WORK/assembled/config.json" ]; then
    parts=$(fastlongspeech small --parts "${base[@]}")
    fastlongspeech assemble --encoder "${parts%%$'\n'*}" --language-model "${parts#*$'\n'}" --output "$WORK/assembled"
fi
stage ctc assembled ctc
stage align ctc align
stage dct align qa
fastlongspeech small --pack "$WORK/dct" --weights "$WORK/weights" "${base[@]}"
python -m fastlongspeech.small.evaluate "$corpus" --speech "$SPEECH" --model "$WORK/dct" \
    --output "$WORK/evaluation" ${STEPS:+--limit 1}
