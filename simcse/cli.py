"""The command ``simcse``: train, evaluate, encode, search, app, convert."""

import importlib
import sys

from simcse.errors import UserError, exit_cleanly

COMMANDS = {
    "train": ("simcse.train", "train an encoder on sentences, pairs or triplets"),
    "evaluate": ("simcse.evaluate", "score an encoder on STS and transfer tasks; plots"),
    "encode": ("simcse.encode", "a file of sentences → a file of vectors, .npy or .parquet"),
    "search": ("simcse.search", "the sentences of a file that are closest to a query"),
    "app": ("simcse.app", "a page in the browser: search, similarities, maps of two models"),
    "convert": ("simcse.convert", "a checkpoint of the reference → a folder for every library"),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with exit_cleanly("simcse"):
        if not argv or argv[0] in ("-h", "--help"):
            print("usage: simcse COMMAND [--flag value ...]\n\nSentence embeddings by contrastive learning.\n")
            print("\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
            print("\nsimcse COMMAND --help explains a command. A first run: simcse train")
            return
        if argv[0] == "--version":
            import simcse

            print(f"fused-infonce {simcse.__version__}")
            return
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]}; choose from {', '.join(COMMANDS)}")
        module = importlib.import_module(COMMANDS[argv[0]][0])
        module.main(argv[1:])


if __name__ == "__main__":
    main()
