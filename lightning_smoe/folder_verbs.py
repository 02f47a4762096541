"""The verbs that take a folder alone, without an experiment."""

from pathlib import Path

from lightning_smoe import compare, reshard, show, verify


class FolderVerbs:
    """Looks at checkpoint folders and finished runs, and writes them in other files."""

    def compare(self, runs: list[Path], output: Path | None = None) -> None:
        """Shows finished runs side by side.

        Args:
            runs: Folders with report.json or sweep.json, all of one original.
            output: Folder for the table and a picture of it; null only shows the table.
        """
        compare.compare(runs, output)

    def inspect(self, checkpoint: str) -> None:
        """Prints what is in a checkpoint: family, layers, experts, parameters, bytes.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
        """
        show.inspect(checkpoint)

    def generate(
        self, checkpoint: str, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0
    ) -> None:
        """Continues a prompt with any checkpoint.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
            prompt: Text to continue.
            max_new_tokens: Tokens to write, at least 1.
            temperature: Randomness of the choice, 0 or more; 0 takes the likeliest token.
        """
        show.generate(checkpoint, prompt, max_new_tokens, temperature)

    def verify(
        self, checkpoint: str, original: str | None = None, prompt: str = "Once upon a time"
    ) -> None:
        """Checks that a checkpoint is whole, and shows how it differs from its original.

        Every tensor is there, of the right shape and finite, files are those that were written, and
        the model loads and continues a prompt. Ends with code 2 where something is wrong.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
            original: What it was made from, to compare with; null compares nothing.
            prompt: Text to continue.
        """
        verify.verify(checkpoint, original, prompt)

    def reshard(self, checkpoint: str, output: Path, max_shard_size: str = "5GB") -> None:
        """Writes a checkpoint again, bit for bit, in weight files of another size.

        Args:
            checkpoint: Checkpoint folder, or organisation/name on the Hugging Face hub.
            output: Folder to write, which must not be there.
            max_shard_size: Weights in one file at most, such as 500MB or 2GB (of 1000 MB); a larger
                tensor has a file to itself.
        """
        reshard.reshard(checkpoint, output, max_shard_size)
