"""`python -m fastlongspeech.evaluation.paper RECIPE`, see `run.py`."""

from .run import main

main()
