"""`python -m langchain_pocket_auth.cli` is the command, where PATH lacks it."""

from . import main

main()
