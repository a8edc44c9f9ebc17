"""Predict the embeddings of the prompts of images, and the training prompts nearest to them.

python predict.py ckpt=runs/demo/2026-01-01_12-00-00 images=pictures/
python predict.py ckpt=RUN images=a.png out=a.jsonl              .parquet, .npz, .jsonl, or .csv for Kaggle
python predict.py ckpt=RUN images=test/ prompts=prompts.csv      prints the mean cosine as well
find . -name "*.png" | python predict.py ckpt=RUN images=-
python predict.py --help                                         every key
"""

from img2prompt.commands.door import main

if __name__ == "__main__":
    main("predict")
