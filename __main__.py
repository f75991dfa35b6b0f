"""`python -m fastlongspeech` is the `fastlongspeech` command."""

import sys

from .app.cli import main

sys.exit(main())
