"""The parity checker: a model plain and pipelined, compared."""
