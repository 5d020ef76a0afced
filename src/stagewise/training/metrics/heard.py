"""A recipe's callback, which hears on every rank what the log gets."""

from collections.abc import Callable, Mapping

from stagewise.training.metrics.progress import (
    ChangeRecord,
    Reporter,
    StepRecord,
    ValidationRecord,
)

Hear = Callable[[Mapping[str, object]], bool]  # of a record; whether it asks for the end


class Heard(Reporter):
    """Passes everything to `reporter`, and lets `hear` have records of steps and validations."""

    def __init__(self, reporter: Reporter, hear: Hear) -> None:
        self._reporter, self._hear = reporter, hear
        self.ends = False  # whether it has asked for the end

    def step(self, record: StepRecord) -> None:
        self._reporter.step(record)
        self.ends |= self._hear(record.to_log())

    def validation(self, record: ValidationRecord) -> None:
        self._reporter.validation(record)
        self.ends |= self._hear(record.to_log())

    def change(self, record: ChangeRecord) -> None:
        self._reporter.change(record)

    def say(self, text: object) -> None:
        self._reporter.say(text)

    def close(self) -> None:
        self._reporter.close()
