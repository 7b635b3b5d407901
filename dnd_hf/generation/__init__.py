"""How codes are drawn from a model: settings, guidance, filters, the loop, and what runs its layers."""
