"""What the experiment runs, and at which size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes and grids. Radii are of the Linf ball, in units of the [0, 1] pixels.

    train_images, validation_images, attacked: the first so many of the training split, of the images held out of it,
    and of the test images. nets: of the ablation, in standard training; ablation_at: of them also adversarially, at
    ablation_epsilon. final_nets: of the final comparison; final_at: of its adversarial training at ablation_epsilon
    alone. few_nets, few_images, few_epochs: nets that are also trained adversarially at ablation_epsilon on so few
    images, for so many epochs, that they overfit. strengths, strengths_at: of the sweep, in standard and adversarial
    training. runoff: how many settings, the best of the sweep's one seed, are compared once more over all seeds.
    standard_epsilon: at which standard training is validated and diagnosed. trades_epsilon: of the training
    attack. burn_in_epsilon, burn_in_share: the radius of the first epochs, where the attack's is larger, and their
    share: without it small networks learn nothing but the commonest class. ensemble: the attacks of AutoAttack; none:
    its standard version. white_box: what Square is compared with. diagnosed: images for the diagnosis; distances: of
    them for FAB.
    """

    data: str = "mnist"
    train_images: int = 10_000
    validation_images: int = 2_000
    attacked: int = 1_000
    diagnosed: int = 200
    distances: int = 100
    nets: tuple[str, ...] = ("mlp", "mlp-bn", "cnn", "cnn-bn")
    final_nets: tuple[str, ...] = ("mlp", "cnn")
    final_at: tuple[str, ...] = ("mlp-bn", "cnn-bn")
    ablation_at: tuple[str, ...] = ("mlp", "mlp-bn")
    few_nets: tuple[str, ...] = ("mlp", "cnn")
    few_images: int = 1_000
    few_epochs: int = 80
    widths: tuple[int, ...] = (128, 128)
    cnn_width: int = 8
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 5e-4
    attack_steps: int = 5
    burn_in_epsilon: float = 0.1
    burn_in_share: float = 0.35
    seeds: tuple[int, ...] = (0, 1, 2)
    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3)
    standard_epsilon: float = 0.1
    trades_epsilon: float = 0.2
    ablation_epsilon: float = 0.2
    trades_beta: float = 6.0
    temperatures: tuple[float, ...] = (0.1, 1.0, 40.0)
    strengths: tuple[float, ...] = (3.0, 10.0, 30.0, 100.0)
    strengths_at: tuple[float, ...] = (3.0, 30.0, 100.0)
    runoff: int = 3
    validation_steps: int = 40
    validation_restarts: int = 2
    clean_tolerance: float = 0.01
    ensemble: tuple[str, ...] = ()
    white_box: tuple[str, ...] = ("apgd-ce", "apgd-t")
    square_queries: int = 2_000
    restarts: int = 10
    curve_spacing: float = 0.05
    surface: int = 21
    bootstrap: int = 2_000


#: Seconds on scikit-learn's digits: that everything runs, not what it shows.
QUICK = Settings(
    data="digits",
    train_images=256,
    validation_images=64,
    attacked=32,
    diagnosed=4,
    distances=2,
    nets=("mlp",),
    final_nets=("mlp",),
    final_at=("mlp-bn",),
    ablation_at=("mlp",),
    few_nets=("mlp",),
    few_images=64,
    few_epochs=2,
    widths=(16,),
    cnn_width=2,
    epochs=2,
    batch_size=64,
    attack_steps=1,
    seeds=(0, 1),
    epsilons=(0.1,),
    trades_epsilon=0.1,
    ablation_epsilon=0.1,
    temperatures=(40.0,),
    strengths=(3.0,),
    strengths_at=(1.0,),
    runoff=1,
    validation_steps=2,
    validation_restarts=1,
    ensemble=("apgd-ce",),
    white_box=("apgd-ce",),
    square_queries=20,
    restarts=2,
    curve_spacing=0.5,
    surface=5,
    bootstrap=50,
)
