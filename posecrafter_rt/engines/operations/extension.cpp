// The operations that OpenVINO finds in the library. Layer 4.
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <vector>

#include "attention_operation.h"
#include "convolution_operation.h"
#include "linear_operation.h"

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<posecrafter::AttentionOperation>>(),
                                     std::make_shared<ov::OpExtension<posecrafter::ConvolutionOperation>>(),
                                     std::make_shared<ov::OpExtension<posecrafter::LinearOperation>>()}));
