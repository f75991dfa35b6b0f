"""`python -m fastlongspeech` is the `fastlongspeech` command."""

import sys

from .cli import main

sys.exit(main())
