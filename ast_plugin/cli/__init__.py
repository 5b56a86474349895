"""The command `basicsr`: one module per subcommand, imported only when that subcommand runs."""
