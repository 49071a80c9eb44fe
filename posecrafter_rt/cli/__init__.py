"""The command line: one file per command, with an `app` that `main` imports when the command is called.

Layer 8: arguments → one call → printed result.
"""
