"""The command line `toast-peft`."""
