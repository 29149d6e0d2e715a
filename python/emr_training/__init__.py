"""Train, attack and evaluate robust classifiers, with Effective Margin Regularization on any defense."""
