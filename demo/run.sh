#!/usr/bin/env bash
# The demo checkpoint from nothing: corpus, base model, stage 1, stage 2, publication with held-out evaluation.
#
#   bash demo/run.sh
#
# Needs espeak-ng and flite. Everything lands in work/ (some GB) but the published checkpoint. A run that was
# stopped goes on where it was; only the evaluation and the publication are always done anew.
set -euo pipefail
cd "$(dirname "$0")/.."

python -m fastlongspeech.demo.corpus work/corpus
[ -e work/base/model ] || python -m fastlongspeech.demo.base work/corpus work/base
[ -e work/ctc/config.json ] || python -m fastlongspeech.train.ctc demo/ctc.yaml
[ -e work/dct/config.json ] || python -m fastlongspeech.train.dct demo/dct.yaml
python -m fastlongspeech.demo.evaluate work/dct work/corpus --output work/heldout.json
python -m fastlongspeech.demo.publish work checkpoints/fastlongspeech-demo
