"""Training and testing: the model, its optimisers and schedules, its training state, its logs and preflight checks."""

# Importing BasicSR registers objects from modules of this package. That has to be complete before any module here is
# imported; otherwise the first one would be registered while it is partially imported.
import basicsr
