"""provisional"""
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class RoundSchedule:
    interval: str
    train_iters: int
    samples_per_epoch: int
    global_batch_size: int

    def round_of(self, iteration: int) -> int:
        if self.interval == "stage":
            return 0
        if self.interval == "epoch":
            return iteration * self.global_batch_size // self.samples_per_epoch
        return iteration // int(self.interval)

    def bounds(self, round: int) -> tuple[int, int]:
        if self.interval == "stage":
            return 0, self.train_iters
        if self.interval == "epoch":
            start, stop = (-(-r * self.samples_per_epoch // self.global_batch_size) for r in (round, round + 1))
            return start, stop
        return round * int(self.interval), (round + 1) * int(self.interval)
