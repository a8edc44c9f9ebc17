"""An exported folder on the Hugging Face Hub: seen by its owner alone, unless said otherwise."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError


def push_folder(folder: Path, name: str, private: bool) -> str:
    """Sends the folder to the repository `name`, which is made where there is none; returns its address. ValueError
    when that fails, or when what should be private would be seen by all.
    """
    hub = huggingface_hub.HfApi()
    try:
        try:
            is_private = bool(hub.repo_info(name).private)
        except RepositoryNotFoundError:
            hub.create_repo(name, private=private)
            is_private = private
        if private and not is_private:
            raise ValueError(f"push={name}: is there and public; say private=false, or give another name")
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="A model that img2prompt exported")
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"push={name}: not sent ({type(error).__name__}: {reason}); {folder} is complete, and "
            f"`hf upload {name} {folder}` sends it"
        ) from None
    return f"https://huggingface.co/{name}"
