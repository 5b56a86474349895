"""The command `basicsr`: one module a subcommand, imported only when it is called."""
