"""The command line: one file a command, each an `app` that `main` imports when the command is called.

Layer 8: arguments → one call → printed result.
"""
