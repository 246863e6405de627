"""Raw parallel text -> checked -> clean -> subwords -> binary. Every module is a ``python -m`` command."""
