"`python -m deepdemix` is the `deepdemix` command."
import sys

from deepdemix.cli import main

if __name__ == "__main__": sys.exit(main())
