"""What a detector's answers are worth: COCO and VOC average precision, proposal recall, kinds of error."""
