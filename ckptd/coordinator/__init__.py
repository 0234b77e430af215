"""The coordinator: a pure state machine, its journal, and its gRPC shell."""
