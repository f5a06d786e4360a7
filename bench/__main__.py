from simcse.errors import exit_cleanly

with exit_cleanly("python -m bench"):  # the imports take seconds, and Ctrl-C has to be clean in them too
    from bench.cli import main

    main()
