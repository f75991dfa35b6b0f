"""What a user meets: the command line, a session with a loaded model, and what a question costs."""
