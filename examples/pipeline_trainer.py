"""transformers' Trainer, with the layers of a Llama over two processes: fine-tuning in 30 lines.

pip install -e '.[trainer]'
torchrun --nproc-per-node 2 examples/pipeline_trainer.py    # or python, or accelerate launch
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from stagewise.integrations.transformers import PipelineTrainer  # in place of Trainer


def main(steps: int = 20) -> float:
    """Train, save, and return the mean loss."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    )
    text = torch.tensor([*(b"To be, or not to be, that is the question: " * 64)])
    rows = [{"input_ids": row, "labels": row} for row in text.unfold(0, 64, 8)]
    arguments = TrainingArguments(
        "runs/pipeline_trainer",
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # which are the pipeline's microbatches
        logging_steps=5,
        report_to=[],
    )
    trainer = PipelineTrainer(model=model, args=arguments, train_dataset=rows)
    loss = trainer.train().training_loss
    trainer.save_model()  # a Hugging Face folder, written by rank 0 from all stages
    return loss


if __name__ == "__main__":
    main()
