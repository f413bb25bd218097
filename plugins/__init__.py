"""The methods: one subpackage each, registered through entry points."""
