#!/usr/bin/env bash
# Makes the demo checkpoint from nothing: corpus, base model, stage 1, stage 2 on clips and then on recordings of
# minutes, the mean of these two, held-out evaluation, publication.
#
#   bash demo/run.sh
#
# Needs espeak-ng and flite. All but the published checkpoint lands in work/ (some GB). A run that was stopped goes on
# where it was; only evaluation and publication are always done anew.
set -euo pipefail
cd "$(dirname "$0")/.."

# bfloat16 is three times as fast as float32 on a CPU that multiplies it, and slower on others.
precision=()
if ! nvidia-smi &> /dev/null && grep -q bf16 /proc/cpuinfo; then
    precision=(--use_cpu true --bf16 true)
fi

python -m fastlongspeech.demo.corpus work/corpus
[ -e work/base/model ] || python -m fastlongspeech.demo.base work/corpus work/base
[ -e work/ctc/config.json ] || python -m fastlongspeech.train.ctc demo/ctc.yaml
[ -e work/dct/config.json ] || python -m fastlongspeech.train.dct demo/dct.yaml
[ -e work/dct-long/config.json ] || python -m fastlongspeech.train.dct demo/dct-long.yaml "${precision[@]}"
[ -e work/average/config.json ] || python -m fastlongspeech.demo.average work/dct work/dct-long work/average
python -m fastlongspeech.demo.heldout work/average work/corpus --output work/heldout.json
python -m fastlongspeech.demo.publish work checkpoints/fastlongspeech-demo
