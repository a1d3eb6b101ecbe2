"""Train on the workers of Ray Train, which starts all of them again after a failure: python ray_train.py."""

from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

RECIPE, RUN = Path("chats.yaml").resolve(), Path("runs/chats").resolve()  # CHANGE: to a disk that all machines share
WORKERS = ScalingConfig(num_workers=2, use_gpu=True)  # CHANGE: a worker for each GPU


def train() -> None:
    """Begin the run, or go on where the workers before have ended."""
    import lora_kit as lk

    lk.train(lk.load_recipe(RECIPE), RUN)


if __name__ == "__main__":
    restarts = RunConfig(name="chats", failure_config=FailureConfig(max_failures=10))  # preempted machines do not count
    TorchTrainer(train, scaling_config=WORKERS, run_config=restarts).fit()
