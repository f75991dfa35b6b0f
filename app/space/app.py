"""The page as a Space: the variable MODEL names a model of the Hub."""

import os

from fastlongspeech.app.page import build, launch
from fastlongspeech.app.session import Session

launch(build(Session(os.environ.get("MODEL") or None)), server_name="0.0.0.0")
