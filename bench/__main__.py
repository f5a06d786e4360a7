"""How fast, how lean, how exact, against what people use today and against the machine: ``python -m bench``."""

import sys

from simcse.errors import exit_cleanly

with exit_cleanly("python -m bench"):  # the imports take seconds, and Ctrl-C has to be clean in them too
    if sys.argv[1:2] == ["first-contact"]:  # on machines without the packages that the other subcommands need
        from bench.contact.command import main

        main(sys.argv[2:])
    else:
        from bench.cli import main

        main()
