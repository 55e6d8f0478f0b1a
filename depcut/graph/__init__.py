"""The toolkit for captured graphs: arguments, names of operators, a run, ancestry, liveness."""
