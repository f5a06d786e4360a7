"""The loss under the names of other libraries' losses, a file a library: the import is the line that changes.

Each file imports its library when it is imported itself; the package needs none of them.
"""
