"""`fastlongspeech serve`: the server of transformers, with recordings that are listened to once."""
