"""The toolkit for captured graphs: arguments, operator names, interpreter, ancestry, liveness."""
