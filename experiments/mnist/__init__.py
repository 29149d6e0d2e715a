"""MNIST, small feed-forward networks: does EMR enlarge margins and robust accuracy, and what predicts robustness?"""
